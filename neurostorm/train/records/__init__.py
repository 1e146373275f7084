"""What a run writes about itself: its manifest, its time, its log lines, its JSONL logs."""
