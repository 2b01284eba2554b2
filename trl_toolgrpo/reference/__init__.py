"""The reference policy: a copy of the adapter or merged weights, and when it follows the policy."""
