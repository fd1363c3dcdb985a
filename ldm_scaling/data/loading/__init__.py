"""From records to batches: shuffled, mixed, cropped, shared out, read ahead."""
