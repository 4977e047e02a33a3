"""What the report page is made of: runs read tolerantly, charts, overlays, sections."""
