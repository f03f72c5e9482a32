"""What the command lines and pages of several hosts share."""
