"""Where frozen models come from: folders, single files, libraries."""
