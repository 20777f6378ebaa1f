"""Parts of the evaluation: its images and captions, its results on disk, its table and plot."""
