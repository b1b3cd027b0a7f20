"""`--report`: a web page with all metrics, and a gallery with the worst images first."""
