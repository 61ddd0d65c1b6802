"""Configs of large models."""
