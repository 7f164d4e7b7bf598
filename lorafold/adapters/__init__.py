"""What is learned, and how it is put on and merged."""
