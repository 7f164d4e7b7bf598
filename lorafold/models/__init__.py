"""Loading and writing model and adapter files."""
