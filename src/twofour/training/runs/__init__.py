"""Training in one call, and the loop of it: distill and finetune, their budget, their optimizer, their way on from a file."""
