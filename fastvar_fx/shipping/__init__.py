"""Programs as compiled packages in a folder, for processes that have no compiler."""
