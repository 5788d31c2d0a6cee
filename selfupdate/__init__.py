"""A service that replaces itself with a newer version of itself, while it serves."""

__version__ = "1.0.0"
