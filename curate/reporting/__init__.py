"""Reports as one HTML file: pages of findings, charts and tables. Nothing is loaded, nothing runs."""
