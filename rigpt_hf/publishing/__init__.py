"""From a folder to the Hub: repositories that a stranger loads, and Spaces that show what RiGPT is."""
