"""Run folders: started, folded, verified, reported."""
