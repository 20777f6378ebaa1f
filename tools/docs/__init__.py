"""What is written and drawn for the editor: help pages, English texts, screenshots, icon."""
