"""What a CPU runs: compiled loops, each beside its torch oracle; nothing of ours is imported here."""
