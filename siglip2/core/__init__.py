"""What every recipe shares: words, towers, loader, and one Lightning module that calls hooks in a fixed order."""
