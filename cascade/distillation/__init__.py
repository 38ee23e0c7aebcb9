"""Distillation: a pruned child learns the next-token distributions of its teacher.

The step takes a student, a teacher behind one small interface (stored states or a live model) and
packed rows; the fused loss turns hidden states into a value and gradients without ever holding
logits for more than a chunk of tokens, and the loop trains, checkpoints and resumes.
"""
