"""What every other room uses: optional packages, and HTML for notebooks."""
