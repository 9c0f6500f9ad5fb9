"""From an Ask to an Evaluation: the tiered evaluator, its repairs, its samples and its brief fine-tune (torch)."""
