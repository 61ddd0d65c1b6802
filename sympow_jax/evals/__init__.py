"""Evaluation: numbers that go into a workdir's `eval/` folder as JSON and npz."""
