"""What a verb does when it spans rooms."""
