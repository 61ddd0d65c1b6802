"""The decoder, its loss, and the Model interface over it."""
