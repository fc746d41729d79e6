// Runs the client of the specification (052-fabrik-daemon.md, "Event Streaming") word for word, between the two marks.
// Around it: its socket's place is $FABRIK_SOCKET, and what it parses is printed, one event a line.
const net = require('net');

const createConnection = (path) => {
  if (path !== '/tmp/fabrik-daemon.sock') throw new Error(`the snippet connects to ${path}`);
  return net.createConnection(process.env.FABRIK_SOCKET);
};
const parse = JSON.parse;
JSON.parse = (text) => {
  const event = parse(text);
  console.log(JSON.stringify(event));
  return event;
};

// --- the specification's snippet
// Client (TUI dashboard) connects
const socket = createConnection('/tmp/fabrik-daemon.sock');

// Subscribe to events
socket.write(JSON.stringify({
  action: 'subscribe',
  clusters: ['dev-k3s', 'prod'],  // or ['*'] for all
  filter: { status: ['running', 'blocked'] },
  includeHistory: 100  // last 100 events immediately
}));

// Receive events (JSON lines)
socket.on('data', (line) => {
  const event = JSON.parse(line);
  // { type: 'run:updated', runId: '01jk7v8x...', cluster: 'dev-k3s', status: 'blocked', ... }
});
// --- end of the snippet
