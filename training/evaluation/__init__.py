"""Parts of the evaluation: its pictures and captions, its results on disk, its table and plot."""
