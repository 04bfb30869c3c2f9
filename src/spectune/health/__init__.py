"""What of our fast paths works on this machine: one check a path, each in a process of its own with a time limit."""
