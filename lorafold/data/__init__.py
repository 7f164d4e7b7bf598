"""Rows of a file become conversations, conversations become tokens with a supervision mask.

read -> rows -> (templates) -> rendering -> tokens -> packs; `preview` shows the result, `demo` is the embedded data.
Each step is a module of its own and imports only what it needs, so nothing is imported here.
"""
