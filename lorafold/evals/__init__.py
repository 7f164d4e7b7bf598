"""Measuring models, in torch and in llama.cpp."""
