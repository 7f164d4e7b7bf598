"""What a weight looks like when packed."""
