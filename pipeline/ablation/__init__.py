"""The ablation: a recipe and its controls at equal budget, over seeds, judged against tuned plain KD. run.py says the order."""
