"""innkeep's guest agent: looks after a microVM from the inside."""
