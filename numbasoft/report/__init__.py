"""What ``python -m numbasoft`` does. Nothing in the library imports this package."""
