"""Commands in the VM and in containers: started, watched, fed, collected, ended."""
