"""The examples, installed and served."""
