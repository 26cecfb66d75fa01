"""GDN prefill: several tokens per request; reads the stored state and leaves the one after the last token."""
