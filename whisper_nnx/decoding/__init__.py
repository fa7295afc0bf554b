"""From encoded audio to token ids: options, rules on the logits, strategies, and the jitted loop. No text."""
