"""Symmetric power attention."""
