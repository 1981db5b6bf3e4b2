"""How good models are: tasks, scores, tables, and lm-evaluation-harness."""
