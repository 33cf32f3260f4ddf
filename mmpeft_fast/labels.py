"""What a token without a target carries."""

IGNORE_INDEX = -100  # what torch's cross-entropy and transformers take as "no target"
