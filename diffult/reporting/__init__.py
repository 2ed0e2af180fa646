"""What a user reads and looks at: pictures of samples, figures, and the HTML pages of a run and of a comparison."""
