#!/usr/bin/perl
# A client of both protocols, made from docs/protocol.md and docs/messages.md alone: no code of ours.
#
#     client.pl SOCKET TOKEN      the agent's unix socket, and the token of the workload's ports
#
# It says in a line each what its conversations came to.
use strict;
use warnings;
use IO::Socket::UNIX;
use JSON::PP;
use MIME::Base64;

my ($agent, $token) = @ARGV;
my $json = JSON::PP->new->utf8;
my ($true, $false) = (JSON::PP::true, JSON::PP::false);
$| = 1;

sub tell_it {
    my ($socket, $message) = @_;
    my $payload = $json->encode($message);
    my $left = pack("N", length $payload) . $payload;
    while (length $left) {
        my $sent = syswrite($socket, $left) or die "send: $!";
        substr($left, 0, $sent) = "";
    }
}

sub exactly {
    my ($socket, $count) = @_;
    my $data = "";
    while (length $data < $count) {
        return undef unless sysread($socket, $data, $count - length $data, length $data);
    }
    return $data;
}

sub hear {
    my ($socket) = @_;
    my $header = exactly($socket, 4);
    return defined $header ? $json->decode(exactly($socket, unpack("N", $header))) : undef;
}

sub dial { return IO::Socket::UNIX->new(Peer => $_[0]) || die "connect to $_[0]: $!" }

sub admitted {
    my ($port, $token, %more) = @_;
    my $socket = dial("${agent}_$port");
    tell_it($socket, {type => "auth", token => $token, protocol_version => 1, %more});
    my $answer = hear($socket)->{type};
    return $answer eq "auth_ok" ? $socket : die "$answer\n";
}

# What was told of each request, and what was told last of any.
my (%output, %end, $ready);
my $control = admitted(5000, $token);

sub heed {
    my ($is_enough) = @_;
    until ($is_enough->()) {
        my $message = hear($control) or die "the agent hung up";
        my ($type, $id) = @$message{qw(type request_id)};
        $ready = 1 if $type eq "ready";
        $output{$id} .= decode_base64($message->{data}) if $type =~ /^std(out|err)$/;
        $end{$id} = "$message->{code} $message->{reason}" if $type eq "exit";
        $end{$id} = "error: $message->{message}" if $type eq "error";
    }
}

sub over {
    my ($id) = @_;
    heed(sub { defined $end{$id} });
    return ($output{$id} // "") . "$end{$id}\n";
}

sub ask { tell_it($control, {@_}) }

heed(sub { $ready });
my @exec = (type => "exec", tty => $false);
ask(@exec, request_id => 1, command => ["sh", "-c", "echo out; exit 3"]);
print "exec: ", over(1);
ask(@exec, request_id => 2, command => ["stty", "size"], tty => $true);
print "tty: ", over(2);
ask(@exec, request_id => 3, command => ["sleep", "1000"]);
ask(type => "signal", request_id => 3, signal => 15);
print "signal: ", over(3);
ask(type => "signal", request_id => 99, signal => 15);
print "nobody: ", over(99);

my @run = (type => "run", env => [["WORD", "hello"]], workdir => "/tmp");
ask(@run, request_id => 4, command => ["sh", "-c", 'echo $WORD $PWD; exec sleep 1000']);
heed(sub { ($output{4} // "") =~ /\n/ });
ask(@run, request_id => 5, command => ["true"]);
print "second: ", over(5);
my $kept = admitted(5001, $token, follow => $false);
my $log = "";
while (my $message = hear($kept)) { $log .= decode_base64($message->{data}) }
print "log: ", (split /\n/, $log)[-1], "\n";
ask(type => "stop", timeout_ms => 10_000);
print "stop: ", over(4);
eval { admitted(5000, "wrong" x 10) };
print "wrong: $@";

my $socket = dial($agent);
tell_it($socket, {method => "ping"});
print "ping: ", hear($socket)->{version}, "\n";
tell_it($socket, {method => "vm_exec", command => ["echo", "plain"]});
print "vm_exec: ", decode_base64(hear($socket)->{stdout});
tell_it($socket, {method => "vm_exec", command => ["cat"], interactive => $true});
print hear($socket)->{status}, "\n";
tell_it($socket, {method => "stdin", data => encode_base64("typed\n", "")});
print "cat: ", decode_base64(hear($socket)->{data});
tell_it($socket, {method => "stdin", data => ""});
print "exited: ", hear($socket)->{exit_code}, "\n";
