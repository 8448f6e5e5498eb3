"""What a trained model is: its parts, its training contract, its folder."""
