"""One file a policy family: how to see a pretrained policy as two velocity fields."""
