"""The page on which a person looks at counts and corrects them: extra ``[review]``, on this computer only."""
