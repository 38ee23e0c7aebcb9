"""Text that a model writes: sampling continuations of prompts."""
