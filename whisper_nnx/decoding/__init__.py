"""From encoded audio to token ids: options, logit filters, strategies, and the jitted loop. No text in here."""
