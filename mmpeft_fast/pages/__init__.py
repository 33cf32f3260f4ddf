"""Self-contained HTML pages of measurements: one style sheet, tables, and charts as inline SVG."""
