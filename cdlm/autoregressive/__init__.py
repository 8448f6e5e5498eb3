"""Autoregressive models: each token is predicted from those before it. The rival that the others are compared with."""
