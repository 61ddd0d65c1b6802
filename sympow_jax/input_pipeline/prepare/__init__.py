"""Making stores: documents from sources, tokenised, arranged in rows, written."""
