"""Figures, tables and the report, from the JSON files of a workdir; imports neither JAX nor the rest."""
