"""What can be used again: checkpoints of prompts, and who resumes from them."""
