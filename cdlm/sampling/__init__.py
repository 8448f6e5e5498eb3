"""The loop that serves requests, and what comes out of it."""
