"""Flax modules that own parameters, built on the pure functions of ops."""
